from ghostssm.cli import main

main()
