"""Building and serving the site."""

import functools
import http.server
import subprocess
import sys
from importlib import metadata
from pathlib import Path

from wellposed.book.errors import UserError

HTML = Path("_build") / "html"
REMEMBERED = Path("_build") / ".doctrees" / "environment.pickle"


def build(root: Path, *, quiet: bool = False, fresh: bool = False, out: Path | None = None) -> Path:
    """Build the site with jupyter-book; a warning is an error.

    Args:
        root: the project's root.
        quiet: show only warnings and errors.
        fresh: build every page anew.
        out: folder to build in; the project's own if None.

    Returns:
        The welcome page.

    Raises:
        UserError: the build failed; its output says why.
    """
    # Its own script beside this interpreter: the package cannot be started with `-m`.
    script = Path(sys.executable).with_name("jupyter-book")
    command = [str(script), "build", "--warningiserror", "--nitpick"]
    command += ["--keep-going", "--path-output", str(out or root)]
    command += ["--all"] if fresh else []
    command += ["--quiet"] if quiet else []
    done = subprocess.run([*command, "."], cwd=root, capture_output=quiet, text=True)
    if done.returncode:
        # What Sphinx remembers of its pages hides from the next build what was wrong with them.
        ((out or root) / REMEMBERED).unlink(missing_ok=True)
        if quiet:
            print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
        raise UserError("the site was not built: the messages above say why")
    return (out or root) / HTML / "index.html"


def mathjax() -> Path:
    """The script that typesets formulas, without fonts or anything else to load."""
    # One file of the package, not its 400: SVG output needs no fonts.
    wheel = metadata.distribution("sphinx-mathjax-offline")
    script = "sphinx-mathjax-offline/static/mathjax/tex-svg-full.js"
    return Path(str(wheel.locate_file(script)))


def serve(root: Path, port: int) -> None:
    """Serve the built site on this machine until interrupted.

    Raises:
        UserError: there is no site yet, or the port is taken.
    """
    if not (root / HTML / "index.html").is_file():
        raise UserError("there is no site yet: run `wellposed build` first")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(root / HTML))
    try:
        server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
    except OSError as error:
        raise UserError(f"cannot serve on port {port}: {error.strerror or error}") from None
    with server:
        server.serve_forever()
