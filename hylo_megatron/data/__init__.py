"""Text, rows and chats to token files for training, and the data sets that read these files."""
