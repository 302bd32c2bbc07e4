"""The solver's inner loops in plain Python, for one layer: what the compiled form in `native/` reproduces to the bit, file by file.

All choices are by (criterion, lowest index); floating-point operations are done one by one, in the order written; nothing depends on the
platform. It also runs where nothing can be compiled, some hundred times slower.
"""
