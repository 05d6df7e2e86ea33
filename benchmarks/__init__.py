"""Programs that measure the package, or inspect what it compiles to; none of them is installed."""
