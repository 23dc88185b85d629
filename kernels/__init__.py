"""Floor 0: the operator itself. torch and, lazily, triton; nothing of meansparse_fx.

Installed as ``meansparse_fx.kernels``; imports inside are relative.
"""
