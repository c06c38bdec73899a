"""One folder per op: reference.py is the specification, op.py the public function and its implementations."""
