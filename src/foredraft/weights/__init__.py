"""What layers compute with, in which bits, and how it is stored. Versions are checked here too, for `convert` alone."""

from foredraft.versions import warn_if_untested

warn_if_untested()
