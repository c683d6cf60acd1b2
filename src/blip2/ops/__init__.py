"""Pure tensor code of the objectives and of distributed training; torch only."""
