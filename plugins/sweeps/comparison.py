def compare(folder):
    print("compare", folder)
