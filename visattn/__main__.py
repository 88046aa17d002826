"""``python -m visattn`` is the command ``visattn``."""

from visattn.cli import main

raise SystemExit(main())
