"""`python -m blip2_edu`."""

try:
    from blip2_edu.app.cli import main
except ModuleNotFoundError as error:
    raise SystemExit(
        f"{error}: is the course's environment active? If so, run "
        "`python -m pip install -r requirements.txt` in the course's folder."
    ) from None

raise SystemExit(main())
