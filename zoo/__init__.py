"""Small reference networks that can be trained on a CPU, one file per family; the examples and tests use them.

They are written as their papers have them and know nothing of how they will be exported.
"""

if __name__ != "edgekit.zoo":
    raise ImportError(
        f"import edgekit.zoo, not {__name__}: a second copy of every class would not be the first one's equal"
    )
