"""Losses and schedules of distillation."""
