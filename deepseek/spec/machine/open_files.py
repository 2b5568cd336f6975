"""The limit of open files, which a server needs one or more of for each connection."""

import resource

MOST = 65_536  # not unlimited: some programs walk all of them


def allow_open_files() -> None:
    """Lets this process and those that it starts open up to MOST files, or as many as the system allows it.

    A shell and Docker start with 1024, which are too few for 500 callers at once.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = MOST if hard == resource.RLIM_INFINITY else min(MOST, hard)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
