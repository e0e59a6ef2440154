"""Equalisation: moving scales between weights, exactly, so that what is rounded later loses less."""
