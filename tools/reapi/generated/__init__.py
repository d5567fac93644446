"""What protoc made of ``tools/reapi/proto``. Not to be edited: `make proto` writes it anew."""
