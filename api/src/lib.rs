//! Configuration and request types of the Triarch API.
