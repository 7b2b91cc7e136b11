"""Rows of recurrent states; they live one room down, where the Hugging Face adapter needs them too."""

from retnet.model.states import join_rows, select_rows

__all__ = ["join_rows", "select_rows"]
