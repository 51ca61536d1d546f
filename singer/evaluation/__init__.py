"""Evaluation of students."""
