"""Reports as pictures and pages: what is shown, in which colours; drawn by matplotlib, or as HTML by hand."""
