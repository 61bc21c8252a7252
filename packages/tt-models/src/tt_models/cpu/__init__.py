"""The blocks' formulas made fast on a CPU; each kernel is here because a benchmark shows what it saves."""
