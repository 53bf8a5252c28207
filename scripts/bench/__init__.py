"""Wall time and memory of qkpatch beside a plain copy and other tools, at real size: ``make bench``."""
