def save_figures(payload, folder):
    return []
