"""Objectives: batch in, named losses out."""
