"""`python -m ghostvis_cli.sglang.plugin.launch`: SGLang's launch_server with HTTP workers that know the plug-in.

With --tokenizer-worker-num above 1 the processes that take requests load no plug-ins. Like all of SGLang's children
they first import the main module of the process that started them, which is this one.
"""

import runpy
import sys

from sglang.srt.plugins import load_plugins

MODULE = "sglang.launch_server"

load_plugins()
if __name__ == "__main__":
    sys.argv[0] = "launch_server.py"  # as in its messages
    runpy.run_module(MODULE, run_name="__main__")
