"""Does it work? probe.py: what frozen tokens know, in minutes. compare.py: methods × seeds × tasks.

parts.py makes the validation parts of which compare.py chooses rates. tables.py: means, intervals.
"""
