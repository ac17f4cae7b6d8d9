"""Models behind one protocol. Whatever of foredraft computes with torch comes through here, so versions are checked."""

from foredraft.versions import warn_if_untested

warn_if_untested()
