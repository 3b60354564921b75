"""Teachers that read what only the hospital may see: reports and tables. Nothing here ever leaves the site."""

from chainward_client.privileged.targets import PrivilegedTargets, TeacherReport, privileged_targets

__all__ = ["PrivilegedTargets", "TeacherReport", "privileged_targets"]
