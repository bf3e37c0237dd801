"""Errors that say what a user of the package got wrong; everything else that is raised is a bug.

Commands turn these, and only these, into one line. Each keeps the built-in class that fits it as a second base.
"""


class A2FPNError(Exception):
    """Base of the errors about input: configurations, data, checkpoints, the Hub."""


class ConfigError(A2FPNError, ValueError):
    """A setting, name or option that does not exist or is out of range."""


class ConfigTypeError(ConfigError, TypeError):
    """A setting of the wrong type."""


class DataError(A2FPNError, ValueError):
    """A COCO file can't be used; the message names the file and the annotation."""


class ImageError(A2FPNError, ValueError):
    """An image can't be used; the message names the file."""


class CheckpointError(A2FPNError, ValueError):
    """A checkpoint that is missing, damaged, or not what it says it is."""


class HubError(A2FPNError, OSError):
    """Something that went wrong between here and the Hub."""


class HubNotFoundError(HubError):
    """A repository, revision or file that does not exist, or that this user may not know of."""


class HubAccessError(HubError):
    """A token that is wrong or not enough, or a gated repository."""


class HubOfflineError(HubError):
    """Files that are not in the cache while there is no network, or none is wanted."""


class HubServerError(HubError):
    """A server that failed, or a connection that broke or was too slow."""


class HubCacheError(HubError):
    """A cache that cannot be written to, because the disk is full above all."""


class HubIntegrityError(HubError):
    """A file that is still not the Hub's after it was downloaded again."""
