"""Things that know nothing about machine learning."""
