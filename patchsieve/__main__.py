"""`python -m patchsieve` is the command `patchsieve`."""

from patchsieve.cli import main

raise SystemExit(main())
