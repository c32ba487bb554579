"""Imported first by the stages and methods: Ctrl-C ends without a traceback while libraries load.

Loading takes seconds. run_stage gives Ctrl-C its usual meaning back. Text that a terminal cannot
show becomes "?".
"""

import _signal  # what `signal` is made of, and there already: importing `signal` takes time
import os
import sys

_signal.signal(_signal.SIGINT, lambda *_: os._exit(130))
for stream in (sys.stdout, sys.stderr):
    if hasattr(stream, "reconfigure"):
        stream.reconfigure(errors="replace")
