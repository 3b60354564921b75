"""A run in MLflow or TensorBoard, beside its run folder, which needs neither."""

from chainward_server.tracking.tracking import Tracking, check_trackers

__all__ = ["Tracking", "check_trackers"]
