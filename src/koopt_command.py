"""Where the command ``koopt`` starts: outside the package, whose import takes a second in which Ctrl-C may come."""

import os
import signal


def main() -> int:
    """Import the command line and run it; 130 after Ctrl-C."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, as in the background
        signal.signal(signal.SIGINT, _leave)
    from koopt import cli

    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    return cli.main()


def _leave(*_: object) -> None:
    """End at once: nothing is open yet, and an exception could get lost in an import."""
    os.write(2, b"koopt: interrupted; nothing was written\n")
    os._exit(130)
