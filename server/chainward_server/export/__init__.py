"""A run's model as a folder that others can use without Chainward: weights, ONNX, and a model card that says what it is."""

from chainward_server.export.run_export import Export, chosen_model, export_run

__all__ = ["Export", "chosen_model", "export_run"]
