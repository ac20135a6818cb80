"""`python -m blip2_edu`."""

from blip2_edu.cli import main

raise SystemExit(main())
