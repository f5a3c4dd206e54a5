"""The pages of the site that are made from the code, one file for each section."""
