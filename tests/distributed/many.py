"""Run several command lines in one job: ``torchrun many.py FILE`` with a JSON list of [arguments, file for stdout]."""

import contextlib
import json
import sys
from pathlib import Path

from zoscope import runtime
from zoscope.cli.app import run

sys.modules["matplotlib"] = None  # type: ignore[assignment]  # as if it were not installed: pictures of runs take seconds
with runtime.joined() as ranks:
    if ranks.leads:
        codes = []
        for args, out in json.loads(Path(sys.argv[1]).read_text()):
            with open(out, "w") as file, contextlib.redirect_stdout(file):
                codes.append(run(args))
        Path(sys.argv[1]).with_suffix(".codes").write_text(json.dumps(codes))
        ranks.stop(0)
    else:
        runtime.serve(ranks)
