"""The paper's tables in small: what is asked, and who does it; published.csv has the paper's own."""
