"""Claims measured on data that ships with the code. A claim that does not hold is printed as not holding."""
