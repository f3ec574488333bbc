"""Opens a bundle's stages on a device and owns the memory that passes between them: one file per runtime.

Every runtime is reached by its entry point (group ``edgekit.runtimes``), as a plugin's is, and imports its device
library in its constructor only.
"""

if __name__ != "edgekit.runtimes":
    raise ImportError(
        f"import edgekit.runtimes, not {__name__}: a second copy of every class would not be the first one's equal"
    )
