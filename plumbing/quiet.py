"""Imported first by the stages and methods: Ctrl-C ends without a traceback while libraries load.

Loading takes seconds. run_stage gives Ctrl-C its usual meaning back. A program of others that
imports from here keeps it. Text that a terminal cannot show becomes "?"; a closed output takes
all text and keeps none. Threads that wait leave their core to others.
"""

import _signal  # what `signal` is made of, and there already: importing `signal` takes time
import os
import sys

root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
folder = os.path.dirname(os.path.abspath(getattr(sys.modules["__main__"], "__file__", "/")))
if root in (folder, os.path.dirname(folder)):  # a script of this repository
    _signal.signal(_signal.SIGINT, lambda *_: os._exit(130))
# torch's threads (libgomp) spin while they wait for each other, by default for milliseconds. Beside
# another busy program a demo step on 2 cores took 5.5 s, not .5; with .2 ms 1.3 s.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
for name in ("stdout", "stderr"):
    if getattr(sys, name) is None:  # closed, as by `>&-`: Python has no stream at all then
        setattr(sys, name, open(os.devnull, "w"))
for stream in (sys.stdout, sys.stderr):
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")
