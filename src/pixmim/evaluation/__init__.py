"""Evaluations of encoders. `evaluate.EVALUATIONS` names them all."""
