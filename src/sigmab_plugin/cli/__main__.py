"""``python -m sigmab_plugin.cli`` is the ``sigmab`` command."""

from __future__ import annotations

import sys

from . import main

if __name__ == "__main__":
    sys.exit(main())
