"""Is the published folder the edit? compare: asks a clean process. child: that process. redo: the edit in memory."""
