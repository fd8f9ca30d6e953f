"""One sequence on several ranks, and a pipeline whose stages all read the teacher."""
