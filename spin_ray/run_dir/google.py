"""The Google account of a process, which obstore and pyarrow read from variables of other names."""

import os

ACCOUNT = ("GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_PATH")
"""Variables of obstore that name an account's file."""


def share_google_account() -> None:
    """Lets pyarrow, which reads data and writes checkpoints, use the account that obstore is given."""
    if account := next((file for name in ACCOUNT if (file := os.environ.get(name))), None):
        os.environ.setdefault("GOOGLE_APPLICATION_CREDENTIALS", account)
