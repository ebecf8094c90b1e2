$ create -q -f raw disk 4M
@ -f raw disk
length
truncate 4608
length
truncate 5M
length
read -P 0 0 5M
l
t 1M
l
