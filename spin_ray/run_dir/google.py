"""The Google account of a process, which obstore and pyarrow read from variables of other names."""

import os


def share_google_account() -> None:
    """Lets pyarrow, which reads data and writes checkpoints, use the account that obstore is given."""
    account = os.environ.get("GOOGLE_SERVICE_ACCOUNT") or os.environ.get("GOOGLE_SERVICE_ACCOUNT_PATH")
    if account:
        os.environ.setdefault("GOOGLE_APPLICATION_CREDENTIALS", account)
