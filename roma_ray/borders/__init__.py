"""Where strangers' text, documents, templates and addresses come in: nothing of theirs is obeyed or shown as it is."""
