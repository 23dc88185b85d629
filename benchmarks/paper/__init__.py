"""The paper's tables in small: `tables` and `published` say what, `training`, `measure` and `page` do it."""
