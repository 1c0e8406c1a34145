"""The bank inside other people's training loops; each module needs its library, and nothing imports one unasked."""
