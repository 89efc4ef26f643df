"""One folder per op: public function in ``__init__``, specification in ``reference``, registration in ``op``."""
