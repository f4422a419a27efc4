"Commands, run in this process as a terminal runs them: a new one would import torch and TransformerLens each time."
import io, sys, warnings
from contextlib import redirect_stderr, redirect_stdout
from unittest.mock import patch

from subspace_circuits import cli


def shown(message, category, filename, lineno, file=None, line=None):
    "A warning where a terminal shows it; pytest would keep it to itself."
    print(warnings.formatwarning(message, category, filename, lineno, line), end="", file=sys.stderr)


def call(*args):
    "Exit code, output and error of one command."
    out, error = io.StringIO(), io.StringIO()
    with (patch.object(sys, "argv", ["subspace-circuits", *map(str, args)]), redirect_stdout(out),
          redirect_stderr(error), warnings.catch_warnings(), patch.object(warnings, "showwarning", shown)):
        try: code = cli.main()
        except SystemExit as e: code = e.code
    return code or 0, out.getvalue(), error.getvalue()


def refused(*args):
    "The one line that a refused command prints."
    code, _, error = call(*args)
    lines = [o for o in error.splitlines() if o.startswith("subspace-circuits: ")]
    assert code == 2 and len(lines) == 1 and "Traceback" not in error, error
    return lines[0]
