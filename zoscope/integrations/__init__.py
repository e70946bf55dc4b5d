"""Ways in for programs that train with other libraries; each module names the one that it is for."""
